// A React component (18 or 19) that writes badge drafts at the same time, each on a stream of its own.
// Over https all streams share one HTTP/2 connection; over http a browser opens one connection for each.

import { useEffect, useId, useRef, useState } from 'react';

const LABELS = { waiting: 'Waiting', writing: 'Writing', done: 'Ready', stopped: 'Stopped', failed: 'Failed' };
const isOpen = (draft) => draft.state === 'waiting' || draft.state === 'writing';

/** The data of each Server-Sent Event of a response; its `type` says what it is. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split('\n\n');
    rest = blocks.pop();
    for (const block of blocks) {
      const line = block.split('\n').find((one) => one.startsWith('data: '));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

/** What a refusal (RFC 9457) says, with every fault of the request. */
async function refusal(response) {
  const problem = await response.json().catch(() => ({}));
  const faults = (problem.errors ?? []).map(({ loc, msg }) => `${loc.join('.')}: ${msg}`);
  const message = [problem.detail ?? `The service answered ${response.status}.`, ...faults].join(' ');
  return { message, code: problem.error_code, requestId: problem.request_id };
}

export default function StreamingBadgeGenerator({
  baseUrl = 'http://localhost:8001',
  apiKey,
  drafts: count = 4,
  options, // further fields of the request: badge_style, institution, temperature, …
  onBadge, // called with each `final` event ({content, achievement, usage, …}) and the number of its draft
}) {
  const id = useId();
  const [course, setCourse] = useState('');
  const [drafts, setDrafts] = useState([]);
  const controllers = useRef([]);

  const stopAll = () => controllers.current.forEach((controller) => controller.abort());
  useEffect(() => stopAll, []);

  async function write(number) {
    const controller = new AbortController();
    controllers.current[number] = controller;

    const update = (change) => {
      if (controllers.current[number] !== controller) return;
      setDrafts((all) => all.map((draft, index) => (index === number ? { ...draft, ...change(draft) } : draft)));
    };
    update(() => ({ state: 'waiting', position: undefined, tokens: 0, badge: {}, error: undefined }));

    let final;
    try {
      const response = await fetch(`${baseUrl}/generate/stream?partial=true&accumulated=false`, {
        method: 'POST',
        headers: { 'Content-Type': 'application/json', ...(apiKey && { Authorization: `Bearer ${apiKey}` }) },
        body: JSON.stringify({ ...options, content: course }),
        signal: controller.signal, // aborting resets the stream, and the service stops the model
      });
      if (!response.ok) {
        const error = await refusal(response);
        return update(() => ({ state: 'failed', error }));
      }
      for await (const event of eventsOf(response)) {
        if (event.type === 'queue') {
          update(() => ({ state: event.position ? 'waiting' : 'writing', position: event.position }));
        } else if (event.type === 'token') {
          update((draft) => ({ state: 'writing', tokens: draft.tokens + 1 }));
        } else if (event.type === 'partial') {
          update(() => ({ badge: event.badge }));
        } else if (event.type === 'error') {
          const error = { message: event.error, code: event.error_code, requestId: event.request_id };
          return update(() => ({ state: 'failed', error }));
        } else if (event.type === 'final') {
          update(() => ({ state: 'done', badge: event.content }));
          final = event;
        }
      }
      if (!final) throw new Error('the stream ended early');
    } catch (error) {
      if (controller.signal.aborted) return update(() => ({ state: 'stopped' }));
      console.warn(error);
      const message = `The connection to ${new URL(baseUrl, window.location).host} failed. Try again.`;
      return update(() => ({ state: 'failed', error: { message } }));
    }
    onBadge?.(final, number);
  }

  const open = drafts.filter(isOpen).length;

  function writeAll(event) {
    event.preventDefault();
    if (open > 0) return;
    const numbers = [...Array(count).keys()];
    setDrafts(numbers.map(() => ({})));
    numbers.forEach(write);
  }

  const tally = Object.entries(LABELS)
    .map(([state, label]) => [label.toLowerCase(), drafts.filter((draft) => draft.state === state).length])
    .filter(([, number]) => number)
    .map(([label, number]) => `${number} ${label}`);

  return (
    <section className="badge-generator" aria-label="Badge drafts">
      <form onSubmit={writeAll}>
        <label htmlFor={`${id}-course`}>Course description</label>
        <textarea
          id={`${id}-course`}
          rows={8}
          style={{ display: 'block', boxSizing: 'border-box', width: '100%' }}
          value={course}
          onChange={(event) => setCourse(event.target.value)}
          required
        />
        {/* A button that is `disabled` would lose the focus. */}
        <button type="submit" aria-disabled={open > 0}>
          Write {count} {count === 1 ? 'draft' : 'drafts'}
        </button>{' '}
        {open > 0 && (
          <button type="button" onClick={stopAll}>
            Stop all
          </button>
        )}
      </form>

      <p role="status">{drafts.length > 0 && `Drafts: ${tally.join(', ')}`}</p>

      <div style={{ display: 'grid', gap: '1rem', gridTemplateColumns: 'repeat(auto-fit, minmax(16rem, 1fr))' }}>
        {drafts.map((draft, number) => (
          <article key={number} aria-labelledby={`${id}-${number}`} aria-busy={isOpen(draft)}>
            <h3 id={`${id}-${number}`}>{draft.badge?.badge_name ?? `Draft ${number + 1}`}</h3>
            <p>
              {LABELS[draft.state]}
              {draft.state === 'waiting' && draft.position > 0 && `, number ${draft.position} in the queue`}
              {draft.tokens > 0 && `, ${draft.tokens} tokens`}
            </p>
            <p>{draft.badge?.badge_description}</p>
            <p>{draft.badge?.criteria?.narrative}</p>
            {draft.error && (
              <p role="alert">
                {draft.error.message}
                {draft.error.code && (
                  <small>
                    {' '}
                    ({draft.error.code}, request {draft.error.requestId})
                  </small>
                )}
              </p>
            )}
            {isOpen(draft) ? (
              <button type="button" onClick={() => controllers.current[number].abort()}>
                Stop draft {number + 1}
              </button>
            ) : (
              <button type="button" onClick={() => write(number)}>
                Write draft {number + 1} again
              </button>
            )}
          </article>
        ))}
      </div>
    </section>
  );
}
