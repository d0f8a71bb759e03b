"""What this rank sends, by axis: counted where it is sent, logged for every step by `train.loop`.

Every collective says what it is for; groups would not tell, for two axes may have the same ranks.

| axis    | what is sent                                                                          |
|---------|---------------------------------------------------------------------------------------|
| `dp`    | parameters and gradients of everything but routed experts: gathered and summed over   |
|         | `dp_shard x cp (x tp)`, summed over the copies, brought to their owners by Muon        |
| `edp`   | the same of the routed experts, over the ranks that hold the same ones                |
| `ep`    | tokens on their way to their experts and back, and how many they are                  |
| `tp`    | tokens of a tensor-parallel group and sums over its heads, channels and vocabulary    |
| `cp`    | tokens of a sequence, whole or before a rank's runs; over `cp x tp` if there are both |
| `pp`    | what a pipeline stage hands to the next one, and the gradients that come back         |
| `world` | small sums over all ranks: losses, labels, norm, load of the experts                  |

Bytes are those of a ring, whatever the library does: see `parallel.volume`. A process is one rank,
so the counter belongs to the module.
"""

from torch import Tensor

from parallel.volume import AXES, Axis

_sent: dict[Axis, float | Tensor] = dict.fromkeys(AXES, 0.0)


def count_sent(axis: Axis, num_bytes: int | float | Tensor) -> None:
    """Add bytes that this rank sends to others; a number on a device stays there for now."""
    _sent[axis] = _sent[axis] + num_bytes


def take_sent() -> dict[Axis, float]:
    """Bytes by axis since the last call; starts over."""
    taken = {axis: float(num_bytes) for axis, num_bytes in _sent.items()}
    _sent.update(dict.fromkeys(AXES, 0.0))
    return taken
