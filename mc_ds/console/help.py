"""The form of `--help` of the programs in `launch/` and `tools/`."""

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and names the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        takes_value = action.option_strings and action.nargs != 0
        has_default = action.default not in (None, argparse.SUPPRESS, "", [], ())
        if text is None or "default" in text or not takes_value or not has_default:
            return text
        return f"{text} (default: %(default)s)"
