"""Codes as the tokens of a language model, and back: `python examples/language_model.py`."""

import numpy as np

import snax
from snax.data.audio import read
from snax.tokens import ORPHEUS, ORPHEUS_END, ORPHEUS_NUMBERS, ORPHEUS_START, TokenLayout

from demo import CLIP, load


def main() -> None:
    model, _ = load()
    codes = model.encode(read(CLIP, model.config.sampling_rate)[None])

    ids = ORPHEUS.flatten(codes)[0]  # 7 a group: coarse, middle, fine, fine, middle, fine, fine
    print("Orpheus' ids:    ", [ORPHEUS_START, *ids[:7].tolist(), "...", ORPHEUS_END])
    numbers = ORPHEUS_NUMBERS.flatten(codes)[0]
    print("and as text:     ", "".join(f"<custom_token_{n}>" for n in numbers[:7].tolist()))
    print("mini-omni's:     ", *snax.tokens.mini_omni_streams(codes)[0, :, :4].tolist())
    own = TokenLayout(model.config.vq_strides, first_id=50_000)  # all slots share 4096 ids
    print("a vocabulary of your own:", own.flatten(codes)[0, :7].tolist())

    # A model stops anywhere: `split` takes the group off that is not whole.
    groups, rest = ORPHEUS.split(np.asarray(ids)[None, :-3])
    audio = model.decode(ORPHEUS.unflatten(groups))
    print(
        f"{groups.size} tokens -> {audio.shape[2] / model.config.sampling_rate:.2f} s; {rest.size} wait for their group"
    )


if __name__ == "__main__":
    main()
