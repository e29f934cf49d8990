"""Hold the commands of ``benchfs``, one module for each group; ``cli`` parses and calls them."""
