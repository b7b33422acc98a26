"""What activations and calls are called.

``neck/convs/0`` is what that layer reads, ``neck/convs/0:out`` what it writes, ``head:add`` the result of the first
``add`` in a call of ``head``, ``head:add-1`` of the second. ``#1`` marks the second call of a layer or module in a
forward pass, ``@1`` the second time that one quantizer runs in it. Slashes stand for dots, which names of modules may
not have.
"""

from __future__ import annotations


def input_name(layer: str, call: int | None = None) -> str:
    """Name of what a layer reads.

    Args:
        layer: Its path.
        call: Which call of it, where there are several with quantizers of their own. Defaults to None.
    """
    return layer.replace('.', '/') + ('' if call is None else f'#{call}')


def output_name(layer: str, call: int | None = None) -> str:
    """Name of what a layer writes, see :func:`input_name`."""
    return f'{layer.replace(".", "/")}:out' + ('' if call is None else f'#{call}')


def result_name(module: str, function: str, index: int, call: int | None = None) -> str:
    """Name of what a function returns that a module calls.

    Args:
        module: Path of the module.
        function: Name of the function.
        index: Which call of the function in one call of the module.
        call: Which call of the module, where there are several. Defaults to None.
    """
    place = f'{module.replace(".", "/")}:{function}' + (f'-{index}' if index else '')
    return place if call is None else f'{place}#{call}'


def factor_name(module: str, function: str, index: int, side: str, call: int | None = None) -> str:
    """Name of what a product of matrices reads: ``head:matmul/left`` or ``/right``; see :func:`result_name`."""
    return f'{result_name(module, function, index, call)}/{side}'


def factors_of(product: str) -> list[str]:
    """The names of a product's two factors, of its name as :func:`product_of` gives it."""
    return [f'{product.replace(".", "/")}/{side}' for side in ('left', 'right')]


def product_of(factor: str) -> str:
    """The name of the product that a factor is of, in the words of the detector; '' for other activations."""
    name, _, side = factor.rpartition('/')
    return name.replace('/', '.') if side in ('left', 'right') else ''


def call_name(layer: str, call: int) -> str:
    """Name of a call of a layer: the layer's for the first one."""
    return f'{layer}#{call}' if call else layer


def layer_of(call: str) -> str:
    """The layer that a call is one of."""
    return call.partition('#')[0]


def call_of(call: str) -> int:
    """Which call of its layer it is; 0 for the first one."""
    return int(call.partition('#')[2] or 0)


def run_name(activation: str, run: int) -> str:
    """Name of one run of an activation's quantizer: the activation's for the first one."""
    return f'{activation}@{run}' if run else activation


def activation_of(run: str) -> str:
    """The activation whose quantizer ran."""
    return run.partition('@')[0]
