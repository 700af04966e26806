"""medvl: medical vision-language systems composed from small pure functions."""
