"""What the data sets have in common."""

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


class VideoDataset(Dataset):
    """Clips (C, T, H, W) float32 in [-1, 1], with one label per clip or one per frame.

    Attributes:
        shape: (C, T, H, W), the same for all clips.
        classes: names of the labels 0, 1, ...; empty for data without classes, whose labels are all 0.
        actions: whether labels are (T,), the action that led to each frame.
        fps: frames per second.
    """

    actions = False
    fps = 8.0

    def describe(self):
        """What a checkpoint records about its data."""
        names = ("shape", "classes", "actions", "fps")
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names}
