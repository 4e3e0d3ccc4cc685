"""All drawn forms, kind by kind."""

from __future__ import annotations

from . import chance, language, largest_rates, noise, order, plateaus, realistic, small_gains, units
from .forms import DrawnForm

DRAWN: tuple[DrawnForm, ...] = (
    *units.FORMS,
    *order.FORMS,
    *plateaus.FORMS,
    *largest_rates.FORMS,
    *language.FORMS,
    *small_gains.FORMS,
    *noise.FORMS,
    *chance.FORMS,
    *realistic.FORMS,
)
"""Every form, in the order of the report's groups."""

BY_NAME: dict[str, DrawnForm] = {form.name: form for form in DRAWN}
"""The forms by name."""
