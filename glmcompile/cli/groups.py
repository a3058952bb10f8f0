"""Options in groups: a section of help for each, and which of a group were given."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource


class GroupedOption(click.Option):
    """An option that is listed under the heading `group`."""

    def __init__(self, *arguments: Any, group: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help has a section for each group of its options."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def group_values(context: click.Context, group: str) -> dict[str, Any]:
    """The values of a group's options by parameter name."""
    return {each.name: context.params[each.name] for each in _members(context, group) if each.name}


def given_options(context: click.Context, group: str) -> list[str]:
    """Those of a group's options that stand in the command, as `--name`."""
    return [
        each.opts[0]
        for each in _members(context, group)
        if each.name and context.get_parameter_source(each.name) is ParameterSource.COMMANDLINE
    ]


def _members(context: click.Context, group: str) -> list[click.Parameter]:
    return [each for each in context.command.params if getattr(each, "group", None) == group]
