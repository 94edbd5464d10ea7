"""Asks the same question at several retentions and shows what each kept and answered.

python compare_retentions.py photo.jpg "What is in the picture?" [host:port]
"""

import sys

from vlcache import DEFAULT_ADDRESS, Client, Compression, Sampling

RETENTIONS = (1.0, 0.5, 0.2, 0.1, 0.05)


def main(image: str, question: str, address: str = DEFAULT_ADDRESS) -> None:
    with Client(address) as client:
        for retention in RETENTIONS:
            completion = client.generate(
                question,
                images=[image],
                sampling=Sampling(max_new_tokens=64, temperature=0.0),
                compression=Compression(retention=retention),
            )
            kept = completion.compression
            kept_bytes = f"{kept.kept_bytes:>12,} bytes kept" if kept else "compression unknown"
            print(f"{retention:>5.0%} {kept_bytes}  {completion.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
