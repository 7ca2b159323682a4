"""beartype as the import hook of `conftest.py` uses it: with the rule of mypy that an int is a fine float."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
