"""What all trainings share; it knows no method and no task: `assemble` takes their parts.

Configuration, command line, launch, DeepSpeed engine, step loop, exactly resuming checkpoints, moving averages, logs.
"""
