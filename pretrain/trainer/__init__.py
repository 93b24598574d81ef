"""What every training shares, whatever it trains: configuration, command line, launch, DeepSpeed engine, the step loop,
checkpoints that resume exactly, moving averages, logs. It knows no method and no task; `assemble` takes their parts.
"""
