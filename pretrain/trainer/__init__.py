"""What all trainings share; it knows no method and no task, whose parts `assemble` takes.

Configuration, command line, launch, DeepSpeed engine, step loop, checkpoints that resume exactly, averages, logs.
"""
