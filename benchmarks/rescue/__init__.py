"""The rescue suite: which failing runs `NaNGuard()` saves, and that it leaves healthy ones alone.

``python -m benchmarks.rescue`` prints the table. What a run consists of lies in :mod:`.data`, :mod:`.models` and
:mod:`.faults`; :mod:`.cases` puts runs together from a seed, :mod:`.contenders` holds the guard and its rivals,
:mod:`.running` trains and judges, :mod:`.report` shows.
"""
