"""Why a model runs by its stock modules."""


class CannotFuseError(Exception):
    """A model, or an adapter in it, that the fused kernels do not know; the message is the reason."""
