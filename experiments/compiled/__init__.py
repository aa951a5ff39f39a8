"""What a compiled program holds, moves and counts, and the chips that are not there to compile it for; for bench and launch.aot alike."""
