"""One rank that runs several of our commands, as `python -m` would, without starting anew for each."""

import importlib
import json
import sys
from unittest.mock import patch

from pretrain.trainer.launch import exit_process

if __name__ == "__main__":
    codes = []
    for module, *arguments in json.loads(sys.argv[1]):
        with patch("downstream.classify.evaluation_cli.exit_process", sys.exit):
            try:
                importlib.import_module(module).main(arguments)
            except SystemExit as ended:
                codes.append(ended.code)
    exit_process(any(codes))
