"""Failing forms on realistic models of 0.1 to 1 million parameters, and their healthy twins.

The models lie by kind in :mod:`.language`, :mod:`.images`, :mod:`.pairs`, :mod:`.speech` and :mod:`.generative`,
:mod:`.rates` holds the rate that is right for each way to train them, and :mod:`.catalogue` the forms.
"""
