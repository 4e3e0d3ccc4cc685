"""How often ``NaNGuard`` touches a healthy run, and how often it harms one.

``python -m benchmarks.rescue.harm`` draws healthy runs from :mod:`benchmarks.rescue.healthy`, trains each bare and
under the guard, and prints the shares. :mod:`.judging` says what touched and harmed mean, :mod:`.measuring` measures
one draw, :mod:`.store` keeps what was measured by the version of the code, :mod:`.report` shows.
"""
