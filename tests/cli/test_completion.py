"""The Tab key in bash, as docs/commands.md has it."""

import shutil
import subprocess

import pytest

from mdn_jax.cli.evaluate import main as evaluate
from mdn_jax.cli.generate import main as generate


@pytest.mark.parametrize(
    ("name", "main", "words", "expected"),
    [
        ("mdn-generate", generate, ["runs/smoke", "--pro"], {"--prompt", "--prompt-file"}),
        ("mdn-eval", evaluate, ["per"], {"perplexity"}),
        ("mdn-eval", evaluate, ["perplexity", "--win"], {"--window"}),
    ],
)
def test_bash_completes(name, main, words, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--tyro-print-completion", "bash"])
    assert not end.value.code
    (tmp_path / name).write_text(capsys.readouterr().out)
    script = (
        f"source {tmp_path / name}; "
        f"COMP_WORDS=({name} {' '.join(words)}); COMP_CWORD={len(words)}; "
        f"_tyro_{name.replace('-', '_')}; complete -p {name} > /dev/null; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    bash = [shutil.which("bash"), "--norc", "-c", script]
    done = subprocess.run(bash, check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) == expected
