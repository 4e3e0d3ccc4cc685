"""Why a fault happened: ``replay`` gathers clues, ``rules`` judge them, one rule a cause.

Nothing is imported here, so that the rules stay importable without torch.
"""
