r"""The base of all containers: named layers, and systems and states that are tuples of those of the layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, ValuesView
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn

from .. import _checks
from ..states import State
from .base import SequenceLayer, System, refuse_forward_only
from .pointwise import as_layer

__all__ = ["Container"]


class Container(SequenceLayer):
    """A sequence layer made of sequence layers.

    Its system and its state are tuples of those of its layers, and it is causal if all layers are. It is also a
    sequence of its layers: `len(container)`, `container[-1]`, `for layer in container`. A layer with a name is also
    `container["name"]`.

    Arguments:
        layers: Modules one by one, or one dictionary of them, whose keys are their names.
    """

    ARGUMENT: ClassVar[str] = "layers"
    """What errors call the layers."""

    def __init__(self, *layers: nn.Module | Mapping[str, nn.Module]) -> None:
        super().__init__()
        named = layers[0] if len(layers) == 1 and isinstance(layers[0], Mapping) else dict(enumerate(layers))
        where = type(self).__name__
        # Only the access by number and by name is used of torch's container, not its `forward`.
        self.layers = nn.Sequential()
        for key, layer in cast(Mapping[Any, nn.Module], named).items():
            name = str(key)
            if not name or "." in name or hasattr(self.layers, name):
                raise ValueError(
                    f"{where}: a name in `{self.ARGUMENT}` must have no dot and be no attribute of torch modules, got "
                    f"{_checks.shown(key)}."
                )
            self.layers.add_module(name, as_layer(where, self.ARGUMENT, layer))
        self.causal = all(layer.causal for layer in self)

    def _children(self) -> ValuesView[SequenceLayer]:
        # `Module.__getattr__` and `Sequential.__iter__` would cost more than the arithmetic of a step.
        return cast(ValuesView[SequenceLayer], self._modules["layers"]._modules.values())  # type: ignore[union-attr]

    def __len__(self) -> int:
        """The number of layers."""
        return len(self._children())

    def __iter__(self) -> Iterator[SequenceLayer]:
        """The layers, in order."""
        return iter(self._children())

    def __getitem__(self, index: int | str) -> SequenceLayer:
        """A layer, by its number or by its name."""
        if isinstance(index, str):
            return cast(SequenceLayer, self.layers._modules[index])
        return tuple(self._children())[index]

    def shares(self, system: System, *states: State) -> Iterable[tuple[Any, ...]]:
        """Splits systems and states among the layers.

        Arguments:
            system: What :meth:`system` returned, or None.
            states: States of this container; usually one, or none.

        Returns:
            For every layer a tuple of the layer, its system (None if `system` is None) and its states.

        Raises:
            ValueError: If a value is not a tuple with an item for every layer.
        """
        children = self._children()
        count = len(children)
        if system is None:
            system = (None,) * count
        # Only a plain tuple: a named tuple of a layer could have the same length by chance.
        for value in (system, *states):
            if type(value) is not tuple or len(value) != count:
                self._refuse("system" if value is system else "state", value)
        return zip(children, system, *cast(Any, states), strict=True)

    def _refuse(self, what: str, value: Any) -> NoReturn:
        got = f"a tuple of {len(value)}" if type(value) is tuple else f"a {type(value).__name__}"
        maker = "initial_state(*batch_shape)" if what == "state" else "system()"
        raise ValueError(
            f"{type(self).__name__}: `{what}` must be a tuple of {len(self)}, one per layer, got {got}; "
            f"make it with this layer's `{maker}`."
        )

    def system(self, rate: float | Tensor = 1.0) -> tuple[System, ...]:
        """The tuple of the layers' systems, all of the same rate."""
        return tuple(layer.system(rate) for layer in self._children())

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The tuple of the layers' states.

        Raises:
            ValueError: If a layer is not causal.
        """
        self.require_causal("initial_state")
        return tuple(layer.initial_state(*batch_shape, device=device, dtype=dtype) for layer in self._children())

    def require_causal(self, method: str) -> None:
        """Raises an error if a layer is not causal; it names that layer.

        Arguments:
            method: The method that needs causal layers.
        """
        if not self.causal:
            refuse_forward_only(type(self).__name__, method, self)

    def forward_only_part(self) -> tuple[str, SequenceLayer]:
        """The first part that is not causal: its path, and the part itself."""
        for name, layer in self.layers._modules.items():
            if isinstance(layer, SequenceLayer) and not layer.causal:
                path, part = layer.forward_only_part()
                return f"layers.{name}" + (f".{path}" if path else ""), part
        return super().forward_only_part()
