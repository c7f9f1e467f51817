"""`python -m hf_recontrol`, and with it `accelerate launch -m hf_recontrol`."""

from .cli import main

main()
