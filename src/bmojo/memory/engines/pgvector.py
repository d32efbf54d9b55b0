"""Blocks in PostgreSQL, found by pgvector: for many machines and users, under the care of an existing server.

One schema a store, whose tables are made at first use:

    store       one row: format, meta (JSON), dim of the keys, the most keys of one block, the next id
    sources     id, name, facts (JSON), blocks, tokens
    tombstones  source (id), blocks: deleted, not yet removed; what is put later under its name is a new source
    blocks      id, source, frame (as in block.py)
    keys        block, layer, source, key halfvec(dim); a partition for each layer

A put is one transaction, published when it commits. The writer holds an advisory lock of its session, which the server
lets go of when that ends, however it ends (so no pooler in transaction mode may stand between).

Searches are exact, unless the URL says `index=hnsw`: then HNSW graphs over `keys` are kept and asked. pgvector filters
after it asked the graph, and goes on asking until enough blocks pass, up to `hnsw.max_scan_tuples` keys and the memory
it may use; a search that finds fewer blocks than were asked for is made again exactly.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import numpy as np

from bmojo.errors import StoreError, nearest
from bmojo.files import optional_module
from bmojo.memory.engines.block import Block, decode, encode, with_id
from bmojo.memory.engines.engine import (
    Engine,
    Found,
    check_blocks,
    check_meta,
    check_search,
    check_source,
    no_blocks,
    no_source,
)

FORMAT = 1
OLDEST = (0, 8)  # of pgvector: half-precision vectors came with 0.7, iterative scans with 0.8
EF_SEARCH = 200
PAGE = 256  # blocks that a scan fetches at once
PATIENCE = 10.0  # seconds that a compaction waits for transactions of others

TABLES = """
create table store (format int, meta text, dim int, most int, next bigint);
create table sources (id bigint generated always as identity primary key, name text, facts text default '{}',
                      blocks bigint default 0, tokens bigint default 0);
create index on sources using hash (name);
create table tombstones (source bigint primary key, blocks bigint);
create table blocks (id bigint primary key, source bigint, frame bytea);
alter table blocks alter frame set storage external;
"""  # uncompressed: there is little to gain on floats
KEYS = """
create table keys (block bigint, layer int, source bigint, key halfvec({dim})) partition by list (layer);
create index on keys using brin (block);
"""
LIVE = "not in (select source from tombstones)"


def open_pgvector(url: str, meta: dict[str, Any] | None = None, mode: str = "r") -> PgvectorEngine:
    """The store at `url`, postgresql://user@host/database?store=NAME: NAME is the schema, by default bmojo; further
    `index=hnsw` and `ef_search=` (default 200) as said above; the rest is libpq's. With mode "a" it is opened for
    writing, and made if it is not there.

    Raises StoreError if there is no such server, database, extension or store, or it is not as asked for.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise StoreError(
            f"the URL of a store in PostgreSQL can't be read: {error}"
        ) from error  # it may tell a password
    asked = {"connect_timeout": "10"} | dict(parse_qsl(parts.query, keep_blank_values=True))
    name, index = asked.pop("store", "bmojo"), asked.pop("index", "flat")
    effort = asked.pop("ef_search", str(EF_SEARCH))
    if not 0 < len(name.encode()) < 64:
        raise StoreError(f"store={name!r} in the store's URL must be a name of 1 to 63 bytes")
    if index not in ("flat", "hnsw"):
        raise StoreError(f"index={index!r} in the store's URL: {nearest(index, ['flat', 'hnsw'])}")
    if not effort.isdecimal() or not 1 <= int(effort) <= 1000:
        raise StoreError(f"ef_search={effort!r} in the store's URL must be a number from 1 to 1000")
    server = f"postgresql://{parts.netloc}{parts.path}?{urlencode(asked, quote_via=quote)}"
    where = f"the store {name!r} at {parts.hostname or asked.get('host', 'the local server')}{parts.path}"
    return PgvectorEngine(server, name, where, meta, mode, int(effort) if index == "hnsw" else None)


class PgvectorEngine(Engine):
    """See the head of this file. server: what libpq connects to; name: the schema; where: how errors call the store;
    effort: hnsw.ef_search, None for exact searches."""

    def __init__(
        self, server: str, name: str, where: str, meta: dict[str, Any] | None, mode: str, effort: int | None
    ) -> None:
        self._psycopg = optional_module("psycopg", "a store in PostgreSQL", "pgvector")
        self._where, self._effort, self._lock = where, effort, RLock()
        self._reader: Any = None
        self._writer: Any = None
        try:
            with self._told():
                self._open(server, name, meta, mode == "a")
        except BaseException:
            self.close()
            raise

    def _open(self, server: str, name: str, meta: dict[str, Any] | None, writes: bool) -> None:
        if writes:
            self._writer = self._connect(server)
            self._be_the_only_writer(name)
            self._writer.execute("create extension if not exists vector")
        self._reader = self._connect(server)
        extension = self._ask(
            "select extversion, nspname from pg_extension join pg_namespace n on n.oid = extnamespace"
            " where extname = 'vector'"
        )
        version = extension[0][0] if extension else "none"
        if not extension or tuple(int(n) for n in version.split(".")[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise StoreError(
                f"{self._where} needs the extension pgvector {oldest} or newer, the database has {version}"
            )
        for connection in filter(None, (self._writer, self._reader)):
            connection.execute(
                "select set_config('search_path', format('%%I, %%I', %s::text, %s::text), false)",
                (name, extension[0][1]),
            )
            connection.execute("set jit = off")  # to compile a search takes longer than the search
        if not self._ask("select 1 from pg_tables where schemaname = %s and tablename = 'store'", name):
            self._make(name, meta or {})
        stated = self._psycopg.sql.SQL("select format, meta from {}").format(
            self._psycopg.sql.Identifier(name, "store")
        )
        ((form, stored),) = self._ask(stated)
        if form > FORMAT:
            raise StoreError(f"{self._where} has format {form}, this bmojo reads up to {FORMAT}; update bmojo")
        self.meta = json.loads(stored)
        check_meta(self.meta, meta, self._where)
        if self._effort is not None:
            self._reader.execute(f"set hnsw.ef_search = {self._effort}")
            self._reader.execute("set hnsw.iterative_scan = strict_order")
        self._look()
        if writes and self._dim is not None:
            self._keep_index(self._writer)

    def _connect(self, server: str) -> Any:
        # without prepared plans: they would be plans for any number of rows asked for
        return self._psycopg.connect(
            server,
            autocommit=True,
            prepare_threshold=None,
            application_name=f"bmojo {socket.gethostname()}:{os.getpid()}",
        )

    def _be_the_only_writer(self, name: str) -> None:
        ((key,),) = self._writer.execute("select hashtextextended('bmojo ' || %s, 0)", (name,))
        ((free,),) = self._writer.execute("select pg_try_advisory_lock(%s)", (key,))
        if not free:
            holder = self._writer.execute(
                "select application_name from pg_locks join pg_stat_activity using (pid) where locktype = 'advisory'"
                " and granted and objsubid = 1 and (classid::bigint << 32 | objid::bigint) = %s",
                (key,),
            ).fetchone()
            raise StoreError(
                f"{self._where} is being written to by another process ({holder[0] if holder else 'unknown'}); wait for"
                " its end, or open the store to read"
            )
        self._writer.execute("set lock_timeout = '60s'")

    def _make(self, name: str, meta: dict[str, Any]) -> None:
        with self._change("there is no such store") as connection:
            if not self._ask("select 1 from pg_namespace where nspname = %s", name):
                connection.execute(self._psycopg.sql.SQL("create schema {}").format(self._psycopg.sql.Identifier(name)))
            connection.execute(TABLES)
            connection.execute("insert into store values (%s, %s, null, 1, 0)", (FORMAT, json.dumps(meta)))

    def _keep_index(self, connection: Any) -> None:
        if self._effort is not None:
            connection.execute("create index if not exists keys_hnsw on keys using hnsw (key halfvec_ip_ops)")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._psycopg.Error as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise StoreError(f"{self._where}: {line}") from error

    def _ask(self, query: Any, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of one statement, on the connection that reads, which threads may share."""
        with self._told():
            return self._reader.execute(query, values).fetchall()

    @contextmanager
    def _change(self, otherwise: str = "it was opened to read") -> Iterator[Any]:
        """A transaction on the connection that writes."""
        if self._writer is None:
            raise StoreError(f"{self._where}: {otherwise}")
        with self._lock, self._told(), self._writer.transaction():
            yield self._writer

    def _look(self) -> None:
        """What a search needs to know, for all blocks before `_next`."""
        ((self._dim, self._most, self._next),) = self._ask("select dim, most, next from store")

    def put(self, blocks: Sequence[Block]) -> list[int]:
        with self._change() as connection:
            dim = check_blocks(blocks, self._dim)
            if not blocks:
                return []
            if self._dim is None:
                connection.execute(KEYS.format(dim=dim))
                self._keep_index(connection)
            most = max(len(block.keys) for block in blocks)
            ((end,),) = connection.execute(
                "update store set dim = %s, most = greatest(most, %s), next = next + %s returning next",
                (dim, most, len(blocks)),
            )
            ids = list(range(end - len(blocks), end))
            sources = self._count(connection, blocks)
            for layer in {block.layer for block in blocks}:
                part = f"create table if not exists keys_{layer} partition of keys for values in ({layer})"
                connection.execute(part)
            with connection.cursor() as cursor:
                with cursor.copy("copy blocks from stdin (format binary)") as copy:
                    copy.set_types(["int8", "int8", "bytea"])
                    for number, block in zip(ids, blocks, strict=True):
                        copy.write_row((number, sources[block.source], encode(with_id(block, number))))
                with cursor.copy("copy keys from stdin (format binary)") as copy:
                    copy.write(_key_rows(ids, [sources[block.source] for block in blocks], blocks))
        self._dim = dim
        return ids

    @staticmethod
    def _count(connection: Any, blocks: Sequence[Block]) -> dict[str, int]:
        """The ids of the blocks' sources, to whose figures they are added."""
        sources: dict[str, int] = {}
        for name in dict.fromkeys(block.source for block in blocks):
            sources[name] = _source(connection, name)
            lengths = [len(block.tokens) for block in blocks if block.source == name]
            connection.execute(
                "update sources set blocks = blocks + %s, tokens = tokens + %s where id = %s",
                (len(lengths), sum(lengths), sources[name]),
            )
        return sources

    def get(self, ids: Sequence[int]) -> list[Block]:
        frames = dict(self._ask(f"select id, frame from blocks where id = any(%s) and source {LIVE}", list(ids)))
        if missing := set(ids) - frames.keys():
            raise no_blocks(missing)
        return [decode(frames[number]) for number in ids]

    def search(self, layer: int, queries: np.ndarray, count: int, *, generation: int, after: int = -1) -> Found:
        if generation >= self._next:
            self._look()
        check_search(layer, queries, count, self._dim)
        if self._effort is not None:
            found = self._search(layer, queries, count, generation, after, "key <#> query")
            if (found.id >= 0).all():
                return found
        # an order by anything but the operator itself is not read from an index
        return self._search(layer, queries, count, generation, after, "-(key <#> query) desc, block desc")

    def _search(self, layer: int, queries: np.ndarray, count: int, generation: int, after: int, order: str) -> Found:
        shape = len(queries), count
        found = Found(np.full(shape, -np.inf, np.float32), np.full(shape, -1, dtype=np.int64))
        if self._dim is None:
            return found
        # of the nearest blocks, the nearest key is among the nearest `count * most` keys
        rows = self._ask(
            f"""
            select row - 1, score, block from unnest(%s::text[]::halfvec[]) with ordinality as queries (query, row)
            cross join lateral (
                select block, max(score) as score from (
                    select block, -(key <#> query) as score from keys
                    where layer = {layer} and block > {after} and block <= {generation} and source {LIVE}
                    order by {order} limit {count * self._most}
                ) as near group by block order by score desc, block desc limit {count}
            ) as found order by row, score desc, block desc""",
            [f"[{','.join(map(str, query))}]" for query in queries.tolist()],
        )
        filled = [0] * len(queries)
        for row, score, block in rows:
            found.score[row, filled[row]], found.id[row, filled[row]] = score, block
            filled[row] += 1
        return found

    def delete(self, source: str) -> int:
        with self._change() as connection:
            live = f"select id, blocks from sources where name = %s and id {LIVE}"
            known = connection.execute(live, (source,)).fetchone()
            if known is None:
                raise no_source(source, self.sources())
            connection.execute("insert into tombstones values (%s, %s)", known)
        return known[1]

    def pin(self) -> int:
        self._look()
        return self._next - 1

    def compact(self) -> None:
        """Erases the rows, and writes the tables anew: a plain VACUUM would leave what was in them in their files.
        Others wait meanwhile. The server's log of changes and its backups keep what they hold for as long as it is set
        to. Raises StoreError while a transaction of another session, begun before, still sees what was deleted."""
        tables = ["sources", "blocks"] + ["keys"] * (self._dim is not None)
        with self._change() as connection:
            for table in tables:
                column = "id" if table == "sources" else "source"
                connection.execute(f"delete from {table} where {column} in (select source from tombstones)")
            ((now,),) = connection.execute("select pg_current_xact_id()::xid::text")
            deleted = connection.execute("select count(*) from tombstones").fetchone()[0]
        with self._lock, self._told():
            if not deleted:
                self._writer.execute(f"vacuum (analyze) {', '.join(tables)}")
                return
            self._await_older(now)
            self._writer.execute(f"vacuum (full, analyze) {', '.join(tables)}")
            self._writer.execute("delete from tombstones")

    def _await_older(self, now: str) -> None:
        """Until no session of this database sees what was before the transaction `now`."""
        older = "select application_name from pg_stat_activity where datname = current_database()"
        older += " and pid <> pg_backend_pid() and age(backend_xmin) >= age(%s::text::xid)"
        end = time.monotonic() + PATIENCE
        while sessions := self._writer.execute(older, (now,)).fetchall():
            if time.monotonic() > end:
                names = ", ".join(sorted({name or "nameless" for (name,) in sessions}))
                raise StoreError(
                    f"{self._where}: what was deleted is hidden but not yet erased, for transactions of other sessions "
                    f"({names}) still see it; end them and compact again"
                )
            time.sleep(0.05)

    def stats(self) -> dict[str, Any]:
        ((blocks, tokens, sources, deleted, size),) = self._ask(f"""
            select coalesce(sum(blocks), 0)::bigint, coalesce(sum(tokens), 0)::bigint, count(*),
                (select coalesce(sum(blocks), 0)::bigint from tombstones),
                (select sum(pg_total_relation_size(oid))::bigint from pg_class where relkind = 'r'
                 and relnamespace = (select relnamespace from pg_class where oid = 'store'::regclass))
            from sources where id {LIVE}""")
        return {
            "engine": "pgvector",
            "blocks": blocks,
            "tokens": tokens,
            "deleted": deleted,
            "sources": sources,
            "bytes": size,
            "generation": self.pin(),
        }

    def sources(self) -> dict[str, dict[str, Any]]:
        rows = self._ask(f"select name, blocks, tokens, facts from sources where id {LIVE} order by id")
        return {name: {"blocks": blocks, "tokens": tokens, **json.loads(facts)} for name, blocks, tokens, facts in rows}

    def note(self, source: str, **facts: Any) -> None:
        check_source(source)
        with self._change() as connection:
            number = _source(connection, source)
            ((old,),) = connection.execute("select facts from sources where id = %s", (number,))
            new = json.dumps(json.loads(old) | facts)
            connection.execute("update sources set facts = %s where id = %s", (new, number))

    def scan(self) -> Iterator[Block]:
        last, end = -1, self.pin()
        page = f"select id, frame from blocks where id > %s and id <= %s and source {LIVE} order by id limit {PAGE}"
        while rows := self._ask(page, last, end):
            yield from (decode(frame) for _, frame in rows)
            last = rows[-1][0]

    def close(self) -> None:
        for connection in (self._writer, self._reader):
            if connection is not None:
                connection.close()


def _source(connection: Any, name: str) -> int:
    """The id of a source, which is made if there is none that is not deleted."""
    known = connection.execute(f"select id from sources where name = %s and id {LIVE}", (name,)).fetchone()
    if known is None:
        known = connection.execute("insert into sources (name) values (%s) returning id", (name,)).fetchone()
    return known[0]


def _key_rows(ids: Sequence[int], sources: Sequence[int], blocks: Sequence[Block]) -> bytes:
    """The rows of the table `keys` in PostgreSQL's binary format of COPY: the length of each field before it, all
    big-endian; a halfvec is its dimension, a zero, and its numbers."""
    keys = np.concatenate([block.keys for block in blocks])
    counts = [len(block.keys) for block in blocks]
    fields = {"block": (">i8", ids), "layer": (">i4", [b.layer for b in blocks]), "source": (">i8", sources)}
    row: list[Any] = [("fields", ">i2")]
    for name, (kind, _) in fields.items():
        row += [(f"{name} bytes", ">i4"), (name, kind)]
    row += [("key bytes", ">i4"), ("dim", ">i2"), ("zero", ">i2"), ("key", ">f2", keys.shape[1:])]
    table = np.zeros(len(keys), row)
    for name, (kind, values) in fields.items():
        table[f"{name} bytes"], table[name] = np.dtype(kind).itemsize, np.repeat(values, counts)
    table["fields"], table["key bytes"] = len(fields) + 1, 4 + 2 * keys.shape[1]
    table["dim"], table["key"] = keys.shape[1], keys
    return b"PGCOPY\n\xff\r\n\0" + bytes(8) + table.tobytes() + b"\xff\xff"
