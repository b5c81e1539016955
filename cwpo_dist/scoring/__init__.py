"""The sharded Ray Data pipeline and what does the work of a shard.

An *actor* is a process of a pool. A *worker* (`ShardWorker`) is the object that does a shard's
work, wherever it lives: in an actor, in the driver (`run_here`), or over ranks (`Together`).
"""
