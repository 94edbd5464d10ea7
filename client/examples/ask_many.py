"""Asks one question about many images at once, a few at a time.

python ask_many.py "What is in the picture?" a.jpg b.jpg c.jpg [--address host:port]
"""

import argparse
import asyncio

from vlcache import DEFAULT_ADDRESS, AsyncClient, Completion, VlcacheError

CONCURRENCY = 8


async def ask(client: AsyncClient, slots: asyncio.Semaphore, question: str, image: str) -> Completion | VlcacheError:
    async with slots:
        try:
            return await client.generate(question, images=[image])
        except VlcacheError as error:
            return error


async def main(question: str, images: list[str], address: str) -> None:
    slots = asyncio.Semaphore(CONCURRENCY)
    async with AsyncClient(address) as client:
        answers = await asyncio.gather(*(ask(client, slots, question, image) for image in images))
    for image, answer in zip(images, answers, strict=True):
        print(f"{image}: {answer if isinstance(answer, VlcacheError) else answer.text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--address", default=DEFAULT_ADDRESS)
    args = parser.parse_args()
    asyncio.run(main(args.question, args.images, args.address))
