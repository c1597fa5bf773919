'use strict';

// ---- skills of a badge
