"""Runs several of our commands one after the other in one process per rank, each as `python -m` would."""

import json
import runpy
import sys
from unittest.mock import patch

from pretrain.trainer.launch import exit_process

if __name__ == "__main__":
    codes = []
    for module, *arguments in json.loads(sys.argv[1]):
        command = [module, *arguments]
        with patch("downstream.classify.evaluation_cli.exit_process", sys.exit), patch.object(sys, "argv", command):
            try:
                runpy.run_module(module, run_name="__main__")
            except SystemExit as ended:
                codes.append(ended.code)
    exit_process(any(codes))
