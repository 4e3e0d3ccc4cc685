"""A small plugin for NaNGuard: a detector, a remedy, a sink and a diagnosis rule, one in each file."""

from nanguard_extras.loss_above import LossAbove
from nanguard_extras.loss_above_limit import loss_above_limit
from nanguard_extras.tally import Tally
from nanguard_extras.write_note import WriteNote

__all__ = ["LossAbove", "Tally", "WriteNote", "loss_above_limit"]
