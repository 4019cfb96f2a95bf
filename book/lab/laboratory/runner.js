/* Trains one network and tells how it goes: in a worker, or in short slices on the page's own thread.
 *
 * `post` sends a report; `slice` is how many milliseconds of work there may be at a time. Returned is what
 * takes the page's messages:
 *   { begin: { task, seed, show, run }, options, until }   a network before its first update, then paused
 *   { options }   from the next update on
 *   { run: true or false }, { once: true }
 * Seconds are those that the updates themselves took, so that two runs on one machine can be compared.
 */
function sogridRunner(engine, post, slice) {
  "use strict";

  const EVERY = 40; // milliseconds between reports
  const PATIENCE = 20; // updates after which a run is said to be lost
  const channel = new MessageChannel();
  let [run, number, options, show, pieces, timer] = [null, 0, null, null, null, null];
  let [running, waiting, until, spent, due, told] = [false, false, 0, 0, 0, 0];
  let [points, recent, seen, first, above, constant] = [[], [], null, null, 0, 0];

  channel.port1.onmessage = () => {
    waiting = false;
    timer = null;
    if (running) work();
  };

  function soon() {
    if (waiting || !running) return;
    waiting = true;
    const rest = due - performance.now();
    if (rest > 1) timer = setTimeout(() => channel.port2.postMessage(0), rest);
    else channel.port2.postMessage(0);
  }

  function work() {
    const begun = performance.now();
    const before = spent;
    while (running) {
      const done = piece();
      spent = before + (performance.now() - begun) / 1000;
      if (done) finish(done);
      const now = performance.now();
      if (now - begun >= slice || now < due) break;
    }
    if (performance.now() - told >= EVERY || !running) report();
    soon();
  }

  function piece() {
    pieces ??= engine.update(run, options);
    const { done, value } = pieces.next();
    if (!done) return null;
    pieces = null;
    return value;
  }

  function finish(value) {
    seen = value;
    points.push(run.updates - 1, spent, value.loss);
    due = Math.max(due, performance.now() - 100) + 1000 / options.speed;
    first ??= value.loss;
    above = value.loss > first ? above + 1 : 0;
    recent.push(value.loss);
    if (recent.length > 2 * PATIENCE) recent.shift();
    if (!Number.isFinite(value.loss) || run.updates >= until) running = false;
  }

  /* Most units of a layer are saturated, and the loss, above that of one answer for all, does not fall. */
  function stuck() {
    const mean = (part) => part.reduce((sum, loss) => sum + loss, 0) / PATIENCE;
    const [before, now] = [recent.slice(0, PATIENCE), recent.slice(PATIENCE)].map(mean);
    return now > 1.25 * constant && now > 0.98 * before && Math.max(...seen.saturated) > 0.5;
  }

  function lost() {
    if (seen && !Number.isFinite(seen.loss)) return "infinite";
    if (above >= PATIENCE) return "above";
    return recent.length === 2 * PATIENCE && stuck() ? "saturated" : null;
  }

  function report() {
    told = performance.now();
    const outputs = engine.outputs(run, show).v;
    const shown = run.task.loss === "logistic" ? engine.sigmoid : (f) => f;
    const picture = Uint8Array.from(outputs, (f) => 255 * shown(f));
    const { changes, saturated } = seen ?? {};
    post({
      run: number,
      running,
      updates: run.updates,
      seconds: spent,
      points: Float32Array.from(points),
      picture,
      changes,
      saturated,
      lost: lost(),
    });
    points = [];
  }

  return (message) => {
    if (message.begin) {
      if (timer) {
        clearTimeout(timer);
        [timer, waiting] = [null, false];
      }
      show = message.begin.show;
      number = message.begin.run;
      run = engine.begin(message.begin.task, message.begin.seed);
      [running, until, spent, due] = [false, message.until, 0, 0];
      [points, recent, seen, first, above, pieces] = [[], [], null, null, 0, null];
      constant = engine.constantLoss(message.begin.task);
    }
    if (message.options) {
      const stale = options && ["damping", "alpha"].some((name) => options[name] !== message.options[name]);
      options = message.options;
      if (stale) engine.forget(run);
    }
    if (message.begin) return report();
    if (message.once) {
      const begun = performance.now();
      let done = null;
      while (!done) done = piece();
      spent += (performance.now() - begun) / 1000;
      finish(done);
      running = false;
      return report();
    }
    if (message.run !== undefined) {
      if (message.until) until = message.until;
      running = message.run && !(seen && !Number.isFinite(seen.loss)) && run.updates < until;
      if (!running) return report();
      soon();
    }
  };
}
