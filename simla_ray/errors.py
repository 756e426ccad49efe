"""The one exception for mistakes of the user; entry points print it as plain lines and exit with code 2."""


class UserError(Exception):
    """A wrong key, file or combination. The message names the key or file, the value found and what is allowed."""
