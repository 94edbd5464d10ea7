"""Asks one question about many images at once, a few at a time.

python ask_many.py "What is in the picture?" a.jpg b.jpg c.jpg [--address host:port]
"""

import argparse

from vlcache import DEFAULT_ADDRESS, Client, Request


def main(question: str, images: list[str], address: str) -> None:
    requests = [Request(question, images=[image]) for image in images]
    with Client(address) as client:
        answers = client.generate_many(requests, on_error="return")
    for image, answer in zip(images, answers, strict=True):
        print(f"{image}: {answer}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--address", default=DEFAULT_ADDRESS)
    args = parser.parse_args()
    main(args.question, args.images, args.address)
