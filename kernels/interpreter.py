"""Two repairs to the interpreter of Triton 3.6, which every module of kernels imports; compiled kernels do not notice.

Its scalars are arrays of one element. NumPy 2.4 no longer makes an int of those, which a loop whose bound is an argument
needs.
"""

import triton
from triton.runtime import interpreter

if triton.knobs.runtime.interpret:
    # the first launch imports it, and that fails where TRITON_INTERPRET was set only while the kernels were defined
    import triton.experimental.gluon

_patch_tensor = interpreter._patch_lang_tensor


def _with_integer_scalars(tensor: type, scope: interpreter._LangPatchScope) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _with_integer_scalars
