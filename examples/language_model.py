"""Convert codes to language-model tokens and back: `python examples/language_model.py`."""

import numpy as np

import snax
from snax.data.audio import read
from snax.tokens import ORPHEUS, ORPHEUS_END, ORPHEUS_NUMBERS, ORPHEUS_START, TokenLayout

from demo import CLIP, load


def main() -> None:
    model, _ = load()
    codes = model.encode(read(CLIP, model.config.sampling_rate)[None])

    ids = ORPHEUS.flatten(codes)[0]  # groups of 7: coarse, middle, fine, fine, middle, fine, fine
    print("Orpheus ids:      ", [ORPHEUS_START, *ids[:7].tolist(), "...", ORPHEUS_END])
    numbers = ORPHEUS_NUMBERS.flatten(codes)[0]
    print("as text:          ", "".join(f"<custom_token_{n}>" for n in numbers[:7].tolist()))
    print("mini-omni streams:", *snax.tokens.mini_omni_streams(codes)[0, :, :4].tolist())
    layout = TokenLayout(model.config.vq_strides, first_id=50_000)  # all slots share 4096 ids
    print("custom layout:    ", layout.flatten(codes)[0, :7].tolist())

    # A language model may stop within a group. `split` separates the incomplete group.
    groups, rest = ORPHEUS.split(np.asarray(ids)[None, :-3])
    audio = model.decode(ORPHEUS.unflatten(groups))
    seconds = audio.shape[2] / model.config.sampling_rate
    print(f"{groups.size} tokens -> {seconds:.2f} s, {rest.size} tokens of an incomplete group left")


if __name__ == "__main__":
    main()
