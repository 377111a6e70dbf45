"""What goes wrong with weights from elsewhere."""


class WeightsError(ValueError):
    """Weights that cannot be read, do not fit, or cannot be written in a layout; the message says which and why."""
