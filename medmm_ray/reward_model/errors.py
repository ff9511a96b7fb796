"""What can be wrong with a checkpoint or an image."""


class CheckpointError(ValueError):
    """A checkpoint that is no reward model; the message says what was looked for."""


class ImageError(ValueError):
    """An image that cannot be made numbers of."""
