"""Old names of what is in files.py now."""

from minigpt.files import UserError, escape_control
from minigpt.files import escape_control as visible

__all__ = ["UserError", "escape_control", "visible"]
