"""The methods. A new one costs one file beside this and one line here."""

from typing import Any

from pretrain.methods.lomar import LoMaR
from pretrain.methods.mae import MAE
from pretrain.methods.simmim import SimMIM

METHODS: dict[str, Any] = {"lomar": LoMaR, "mae": MAE, "simmim": SimMIM}
