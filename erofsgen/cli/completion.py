"""``erofsgen completion``: scripts for shells."""

from __future__ import annotations

import click

from erofsgen.cli.shared import Settings, verb


@verb()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(settings: Settings, shell: str) -> None:  # noqa: ARG001  (every verb gets the settings)
    """Print a shell's completion script.

    \b
    bash:  erofsgen completion bash > /etc/bash_completion.d/erofsgen
    zsh:   erofsgen completion zsh > "${fpath[1]}/_erofsgen"
    fish:  erofsgen completion fish > ~/.config/fish/completions/erofsgen.fish
    """
    from click.shell_completion import get_completion_class

    from erofsgen.cli.main import program

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(program, {}, "erofsgen", "_EROFSGEN_COMPLETE").source())
