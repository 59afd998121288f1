"""The one error that is the user's to mend: commands print its message on one line and exit with code 2."""

import re

# What moves the cursor, colours a screen, breaks a line or turns the direction of writing, and lone surrogates.
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 1000  # characters of a message


class UserError(ValueError):
    """Says what is wrong, where, and what to do. What it quotes may come from a stranger's file, so that control
    characters are spelled out and a long message is cut in its middle."""

    def __init__(self, message):
        text = visible(str(message))
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        super().__init__(text)


def visible(text, keep=""):
    """`text` with control characters spelled out, as \\x1b or \\u202e, but for those in `keep`."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
