"""What a run trains: adapters, or all parameters."""

from optax_lowmem.qlora.kinds.adapters import Adapters
from optax_lowmem.qlora.kinds.all_parameters import AllParameters
from optax_lowmem.qlora.kinds.kind import Kind
from optax_lowmem.qlora.run.settings import Settings, Trained, trained_by

KINDS: dict[Trained, Kind] = {"adapters": Adapters(), "all parameters": AllParameters()}


def kind_of(s: Settings) -> Kind:
  """What a run with these settings trains."""
  return KINDS[trained_by(s)]
