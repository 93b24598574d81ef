"""Training on mmengine: command line, runners, DeepSpeed's ZeRO as a strategy, hooks and resumable data order."""
