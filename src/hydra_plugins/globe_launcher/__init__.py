"""Hydra's launchers that `conf/hydra/launcher` names beside those of other packages."""
