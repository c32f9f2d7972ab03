// Numbers as people read them, with their units. Knows no page; null is a dash.

export const UNKNOWN = "–";

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function formatScaled(value, units, step) {
  let index = 0;
  while (index < units.length - 1 && Math.abs(value) >= step * 0.9995) {
    value /= step;
    index += 1;
  }
  const digits = index === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[index]}`;
}

export const formatBytes = (bytes) => (isNumber(bytes) ? formatScaled(bytes, ["B", "kB", "MB", "GB", "TB"], 1000) : UNKNOWN);

export const formatBandwidth = (rate) => (isNumber(rate) ? `${formatBytes(rate)}/s` : UNKNOWN);

export const formatCount = (count) => (isNumber(count) ? count.toLocaleString("en-US") : UNKNOWN);

export function formatRate(rate) {
  return isNumber(rate) ? (rate >= 99.95 ? formatCount(Math.round(rate)) : rate.toFixed(1)) : UNKNOWN;
}

export const formatShare = (share) => (isNumber(share) ? `${Math.round(100 * share)} %` : UNKNOWN);

// A short time: 850 µs, 7.1 ms, 2.30 s.
export function formatSeconds(seconds) {
  if (!isNumber(seconds)) return UNKNOWN;
  if (seconds >= 0.9995) return `${seconds.toFixed(seconds >= 99.95 ? 0 : seconds >= 9.995 ? 1 : 2)} s`;
  if (seconds >= 0.0009995) return `${(1e3 * seconds).toFixed(seconds >= 0.09995 ? 0 : seconds >= 0.009995 ? 1 : 2)} ms`;
  return `${Math.round(1e6 * seconds)} µs`;
}

// A long time: 12 s, 3 min, 1 h 05 min, 2 d 3 h.
export function formatDuration(seconds) {
  if (!isNumber(seconds)) return UNKNOWN;
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (hours < 1) return `${minutes} min`;
  if (hours < 24) return `${hours} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

// [first, end) as the first and the last that are inside.
export function formatInterval(interval) {
  if (!interval) return UNKNOWN;
  const [first, end] = interval;
  if (end <= first) return "none";
  return end - first === 1 ? `${first}` : `${first}–${end - 1}`;
}

// part / whole, null where either is not known.
export const divide = (part, whole) => (isNumber(part) && isNumber(whole) && whole > 0 ? part / whole : null);

// Words with numbers in them, or a dash where none of the numbers is known.
export function say(values, write) {
  return values.some(isNumber) ? write(...values) : UNKNOWN;
}
