"""What clients send and what they are answered, as types; see `common` for what is refused."""
