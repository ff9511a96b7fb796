"""Short guideline documents for the phantom world: chest radiography, and distractors from other specialties."""

from medmm_ray.data.sources import SourceDocument

CHEST = {
    "Pleural effusion on the upright chest radiograph": (
        "Fluid in the pleural space gathers at the lung base. The first sign is a blunted costophrenic angle; a larger "
        "collection forms a meniscus that climbs the side wall and hides the diaphragm. Compare the two angles, and "
        "report the side on which the angle has lost its sharp corner."
    ),
    "How large is a pleural effusion?": (
        "About 200 millilitres blunt the lateral costophrenic angle on a frontal view. With more fluid the lower zone "
        "turns dense, its upper border is concave, and the border stands highest at the chest wall. An opaque "
        "hemithorax with a free heart border asks for an ultrasound examination."
    ),
    "Recognising pneumothorax": (
        "Air in the pleural space rises to the apex. Look for a thin lung edge that runs parallel to the chest wall, "
        "with no lung markings beyond it. The area outside the edge is darker than the other side. Skin folds imitate "
        "an edge but fade, and vessels cross them."
    ),
    "Size and urgency of pneumothorax": (
        "Measure the distance between the lung edge and the chest wall at the level of the hilum. Two centimetres or "
        "more count as large. Displacement of the mediastinum, falling blood pressure and distended neck veins mean "
        "tension and need decompression before any further picture is taken."
    ),
    "Consolidation and its borders": (
        "Airspaces filled with pus, blood or water appear as a patchy opacity without a sharp border. Dark branching "
        "bronchi inside it, the air bronchogram, prove that the airspaces are filled. State the zone: upper or lower, "
        "right or left, and whether the diaphragm or heart border is lost."
    ),
    "Community-acquired pneumonia: the radiograph": (
        "In fever and cough a new airspace opacity supports the diagnosis of pneumonia. One zone of one lung is most "
        "common, the lower more often than the upper. Repeat the radiograph after six weeks in smokers and in people "
        "above fifty years to exclude a hidden tumour."
    ),
    "The solitary lung nodule": (
        "A nodule is a round opacity of at most three centimetres with lung on all sides. A smooth, sharp border "
        "favours a benign cause, spicules favour cancer. Compare with earlier pictures: two years without growth make "
        "cancer unlikely. Do not take the nipple or a rib end for a nodule."
    ),
    "Follow-up of incidental nodules": (
        "Solid nodules under six millimetres in people at low risk need no follow-up. Between six and eight "
        "millimetres a computed tomography after six to twelve months is advised. Larger ones need earlier imaging or "
        "tissue. Record the zone and the side so that the next reader finds it."
    ),
    "Cardiomegaly and the cardiothoracic ratio": (
        "Divide the greatest width of the heart by the greatest inner width of the chest. On a posteroanterior view in "
        "full inspiration a ratio above one half means cardiomegaly. A poor inspiration or an anteroposterior view "
        "enlarges the cardiac silhouette without disease."
    ),
    "Heart failure on the chest radiograph": (
        "An enlarged heart, vessels that are wide in the upper zones, fine lines at the bases and small effusions on "
        "both sides speak for heart failure. An enlarged heart alone with clear lungs is common in long-standing "
        "hypertension and in cardiomyopathy."
    ),
    "The normal chest radiograph": (
        "In a normal study both lungs are clear, lung markings reach the outer third, both costophrenic angles are "
        "sharp, the heart takes less than half of the chest, and the trachea runs in the midline. Say so plainly; a "
        "list of things not seen does not help the reader."
    ),
    "Sides and markers": (
        "A frontal radiograph is viewed as if the patient faced the reader, so the right side of the patient is on the "
        "left of the picture. A letter R marks the right. Check the marker before naming a side; the apex of the heart "
        "and the gas bubble of the stomach lie on the left."
    ),
    "A search pattern for the chest": (
        "Read in a fixed order: apices, upper zones, lower zones, costophrenic angles, diaphragm, heart, mediastinum, "
        "bones. Compare right with left at every level. Return to the apices and behind the heart at the end, where "
        "small findings are missed most often."
    ),
    "Lung zones": (
        "The lung on a frontal view is divided into zones because lobes overlap. The upper zone lies above the hilum, "
        "the lower zone beneath it. Fluid settles in the lower zone, free air rises to the upper zone, and pneumonia "
        "or a nodule may occupy either."
    ),
    "Technical quality of a chest radiograph": (
        "A good view shows ten posterior ribs above the diaphragm, clavicles at equal distance from the spine, and the "
        "spine faintly behind the heart. Rotation makes one lung darker. Underexposure hides the left base and "
        "imitates an opacity there."
    ),
    "Breathlessness: what to look for": (
        "Sudden breathlessness in a slim young person suggests pneumothorax; slow breathlessness with swollen legs "
        "suggests effusion or an enlarged heart; with fever, consolidation. The history directs the eye but the "
        "picture decides, and a clear chest is a result as well."
    ),
    "Opacity: patchy or round": (
        "An opacity with a ragged border that fades into the lung is called patchy and suggests consolidation. One "
        "with a circular outline is called round and is a nodule or a mass. One that has a horizontal or concave upper "
        "border and lies at the base is fluid."
    ),
    "Chest tubes after pneumothorax or effusion": (
        "For air the tube is directed to the apex, for fluid to the base. A control radiograph shows the position of "
        "the tip, the expansion of the lung and what is left of air or fluid. Persistent bubbling means that the lung "
        "still leaks."
    ),
}

OTHER = {
    "Diabetic foot examination": (
        "Inspect both feet once a year. Test protective sensation with a ten-gram monofilament at several points, feel "
        "the pulses, and look for callus, deformity and ulcers. Loss of sensation or of pulses raises the risk class "
        "and shortens the interval to the next visit."
    ),
    "Melanoma: the ABCDE rule": (
        "Asymmetry, an irregular border, more than one colour, a diameter above six millimetres and evolution over "
        "months are warning signs in a mole. Dermoscopy by a trained reader improves accuracy. Suspicious lesions are "
        "excised with a narrow margin and sent to pathology."
    ),
    "Acute appendicitis": (
        "Pain that begins around the navel and moves to the lower right abdomen, loss of appetite and tenderness at "
        "McBurney's point are typical. Ultrasound shows a tube wider than six millimetres that cannot be compressed. "
        "Surgery or antibiotics are chosen together with the patient."
    ),
    "Stroke: first imaging": (
        "A non-contrast computed tomography of the head excludes bleeding before thrombolysis. Early signs of "
        "infarction are loss of the insular ribbon and a dense middle cerebral artery. Do not delay treatment for "
        "further sequences when the time window is short."
    ),
    "Fracture of the distal radius": (
        "A fall on the outstretched hand is the usual cause. Two views of the wrist show dorsal tilt, shortening and "
        "joint involvement. Stable fractures are treated in a cast for five weeks, unstable ones with a plate; check "
        "the median nerve before and after reduction."
    ),
    "Iron deficiency anaemia": (
        "Low ferritin proves iron deficiency; a normal one does not exclude it in inflammation. Search for blood loss "
        "in adults. Oral iron on alternate days is absorbed well. The haemoglobin should rise by ten grams per litre "
        "within three weeks."
    ),
    "Glaucoma screening": (
        "Raised pressure in the eye, a cupped optic disc and loss of the peripheral field define glaucoma. Relatives "
        "of affected people are examined from forty years on. Drops that lower the pressure slow the loss of vision "
        "but do not restore it."
    ),
    "Helicobacter and peptic ulcer": (
        "Test for Helicobacter in every peptic ulcer, by breath test, stool antigen or biopsy. Eradication takes two "
        "weeks of a proton pump inhibitor with antibiotics. Confirm success four weeks later. Stop anti-inflammatory "
        "drugs where that is possible."
    ),
    "Urinary tract infection in pregnancy": (
        "Bacteria in the urine are treated in pregnancy even without symptoms, because infection of the kidney and "
        "early labour may follow. Choose a drug that is safe for the child, repeat the culture after a week, and test "
        "again in the third trimester."
    ),
    "Thyroid nodules on ultrasound": (
        "A thyroid lump that is solid, dark, taller than wide, with small calcifications and a ragged margin is "
        "aspirated with a fine needle from one centimetre on. Cysts and spongy lumps are left alone. Measure the "
        "hormone first: a warm one is seldom malignant."
    ),
    "Gout": (
        "A red, swollen joint of the big toe that began at night is gout until proved otherwise. Crystals in the joint "
        "fluid are needle-shaped and bend light negatively. Treat the attack with colchicine or steroids and lower "
        "uric acid in the long run."
    ),
    "Childhood otitis media": (
        "A bulging, red eardrum with fever and pain means acute otitis media. Most children above two years recover "
        "without antibiotics; give pain relief and review after two days. Persistent fluid behind the drum for three "
        "months calls for a hearing test."
    ),
}

DOCUMENTS = (
    *(SourceDocument(corpus="chest", title=title, text=text) for title, text in CHEST.items()),
    *(SourceDocument(corpus="other", title=title, text=text) for title, text in OTHER.items()),
)
