"""Casts of weights to 16 bits and of their gradients back, which autocast puts around every product, made by one launch.

The compiler fuses a cast with what reads it, but products are a library's, so each weight and bias of a block is cast by a launch
of its own: with small models or few images it is launches that take the time. Lists of tensors it copies in one.
"""

import operator

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

CAST = torch.ops.prims.convert_element_type.default
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
VIEWS = {torch.ops.aten.permute.default, torch.ops.aten.view.default, torch.ops.aten.reshape.default}


class CastsTogether(CustomGraphPass):
    """A pass of the compiler over a region's forward or backward graph: one launch casts all that the region is given and only
    products read, and one all products that are its results. Other casts, and other kinds of device, are left as they are."""

    def __init__(self, device: str = "cuda"):
        self.device = device

    def __call__(self, graph: fx.Graph) -> None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        casts = [node for node in graph.nodes if node.target is CAST and self._takes(node.meta["val"])]
        given = [cast for cast in casts if cast.args[0] in inputs and _only_products_read(cast)]
        made = [cast for cast in casts if _is_product(cast.args[0]) and all(user.op == "output" for user in cast.users)]
        if len(given) > 1:
            _together(graph, given, after=inputs[-1])
        if len(made) > 1:
            _together(graph, made, after=made[-1])

    def _takes(self, value: Tensor) -> bool:
        """Of a size that is known: weights are, and rows of a batch needn't be."""
        return value.device.type == self.device and all(isinstance(size, int) for size in value.shape)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,), self.device)


def _only_products_read(node: fx.Node) -> bool:
    """Or backward, which is given what a forward pass keeps."""
    return all(
        user.target in PRODUCTS or user.op == "output" or (user.target in VIEWS and _only_products_read(user))
        for user in node.users
    )


def _is_product(node: fx.Node) -> bool:
    return node.target in PRODUCTS or (node.target in VIEWS and _is_product(node.args[0]))


def _together(graph: fx.Graph, casts: list[fx.Node], after: fx.Node) -> None:
    """Replace casts by one operation on lists, after a node that all they read comes before."""
    with graph.inserting_after(after):
        together = graph.call_function(torch.ops.aten._foreach_copy.default)
    with graph.inserting_before(together):
        places = [_empty_like(graph, cast) for cast in casts]
    together.args = (places, [cast.args[0] for cast in casts])
    together.meta["val"] = [cast.meta["val"] for cast in casts]
    for index, cast in reversed(list(enumerate(casts))):
        with graph.inserting_after(together):
            made = graph.call_function(operator.getitem, (together, index))
        made.meta.update(cast.meta)
        cast.replace_all_uses_with(made)
        graph.erase_node(cast)


def _empty_like(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What the copy goes to, for its number format: no memory is taken for it."""
    value = node.meta["val"]
    settings = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    empty = graph.call_function(torch.ops.aten.empty.memory_format, (list(value.shape),), settings)
    empty.meta["val"] = value
    return empty
