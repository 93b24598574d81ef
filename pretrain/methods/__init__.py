"""The methods. A new one costs one file beside this and one line here."""

from typing import Any

from pretrain.methods.lomar import LoMaR

METHODS: dict[str, Any] = {"lomar": LoMaR}
