"""Run the requests of many callers on one model: queue, batch, stream, cancel.

Nothing here knows HTTP. Read in this order:

1. scheduler.py: `Scheduler` is what servers call. `submit` checks a request and puts it into the
   queue; `close` drains.
2. job.py: `Job` is one request: its events, its result, and how to cancel it.
3. images.py: one thread reads and encodes the images of waiting requests.
4. prefixes.py: rows of earlier prompts, which a prompt that begins alike does not run again. They
   and the image features are in one store (../content_store.py), in memory and in a folder
   (../disk_store.py).
5. engine.py: one thread owns the decoder. Between two steps it lets requests join and leave; each
   step runs one chunk of a waiting prompt and one token of every running row.
"""

from vlmport.runtime.scheduling.job import Event, Finished, Job, Piece, Reason, Times
from vlmport.runtime.scheduling.scheduler import Scheduler
from vlmport.runtime.scheduling.stats import SchedulerStats

__all__ = [
    "Event",
    "Finished",
    "Job",
    "Piece",
    "Reason",
    "Scheduler",
    "SchedulerStats",
    "Times",
]
