"""Make Triton 3.6's interpreter run with numpy 2.5, which refuses to turn an array of one element into an int."""

from typing import Any


def mend_interpreter() -> None:
    """Squeeze such arrays first, as Triton 3.7 does."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        for one in scope:
            one.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
