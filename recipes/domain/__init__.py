"""What the recipes of the domains share: settings, rows to questions, splits, training, the table, the card, the demo."""

from .demo import Demo
from .run import run
from .settings import Domain, HubData

__all__ = ["Demo", "Domain", "HubData", "run"]
