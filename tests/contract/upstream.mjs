// Upstream's judgement of bodies: JSON.parse, then the published description of a ReplayBatch, in zod.
//
// Asked about pairs: a body, and what the relay would send in its place (nothing where it refuses the body).
// Answers for each pair, in order:
//   null       the body is no JSON
//   {issues}   it is JSON but no batch; zod's issues
//   {reading}  what upstream reads: session id, window id, sequence, flush, number of events; and `kept`, whether the
//              relay's text says the same: every event to the letter, the rest value for value

import { readSync, writeSync } from "node:fs";
import { isDeepStrictEqual } from "node:util";
import * as z from "zod";

const name = z.string().min(1);
const text = z.string().nullish();

const replayBatch = z.looseObject({
  session: z.looseObject({
    id: name,
    windowId: name,
    startedAt: z.number(),
    lastActivityAt: z.number(),
    url: z.string(),
  }),
  user: z.looseObject({ anonymousId: name, id: text, properties: z.record(z.string(), z.unknown()).nullish() }),
  page: z.looseObject({
    url: z.string(),
    referrer: text,
    viewport: z.looseObject({ width: z.number(), height: z.number() }).nullish(),
  }),
  replay: z.looseObject({
    events: z.array(z.looseObject({ timestamp: z.number(), type: z.int(), data: z.unknown().nonoptional() })).min(1),
    sequence: z.int().min(0),
  }),
  metadata: z.looseObject({ userAgent: text, language: text }).nullish(),
  flush: z.enum(["normal", "final"]).default("normal"),
});

// Of JavaScript's two zeros and of a default, what is meant is compared; events are compared apart.
const meaning = (batch) => ({
  ...batch,
  flush: batch.flush ?? "normal",
  replay: { ...batch.replay, sequence: batch.replay.sequence + 0, events: null },
});

const isKept = (batch, sent) =>
  isDeepStrictEqual(meaning(batch), meaning(sent)) &&
  JSON.stringify(batch.replay.events) === JSON.stringify(sent.replay.events);

// As fetch's Request.json() does: a byte order mark is dropped, what is no UTF-8 is replaced.
const parse = (bytes) => JSON.parse(new TextDecoder().decode(bytes));

function judge(body, relayed) {
  let batch;
  try {
    batch = parse(body);
  } catch {
    return null;
  }
  const { error } = replayBatch.safeParse(batch);
  if (error) return { issues: error.issues };
  const { session, replay, flush } = batch;
  const reading = [session.id, session.windowId, replay.sequence, flush ?? "normal", replay.events.length];
  return { reading, kept: relayed.length > 0 && isKept(batch, parse(relayed)) };
}

function read(size) {
  const bytes = Buffer.alloc(size);
  for (let at = 0, count; at < size; at += count) {
    count = readSync(0, bytes, at, size - at, null);
    if (!count) process.exit();
  }
  return bytes;
}

const readNumber = () => read(4).readUInt32BE();

for (;;) {
  const inputs = Array.from({ length: readNumber() }, () => read(readNumber()));
  const answers = [];
  for (let at = 0; at < inputs.length; at += 2) answers.push(judge(inputs[at], inputs[at + 1]));
  const line = Buffer.from(JSON.stringify(answers) + "\n");
  for (let at = 0; at < line.length; ) at += writeSync(1, line, at);
}
